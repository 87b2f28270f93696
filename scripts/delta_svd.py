"""The command `jaxdelta`, from a checkout."""

from jaxdelta.commands.analyze import main

if __name__ == "__main__":
    main()
