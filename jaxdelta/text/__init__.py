"""The calibration text: documents, tokenizer, tokens, windows, and the groups that resampling draws."""

from jaxdelta._faces import face

__all__, __getattr__, __dir__ = face(
    __name__,
    ResamplingGroups="groups",
    Tokens="tokens",
    load_encoder="tokenizer",
    read_documents="documents",
    tokenize="windows",
)
