"""The command `jaxdelta-convert`, from a checkout."""

from jaxdelta.commands.convert import main

if __name__ == "__main__":
    main()
