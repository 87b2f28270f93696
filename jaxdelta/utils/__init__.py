"""Files, reading ahead, timing and the command line; nothing specific to the field."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__, AnyArray="arrays", Clock="timing", Command="command", Stages="timing", write_together="files"
)
