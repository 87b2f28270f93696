"""The command `jaxdelta-compare`, from a checkout."""

from jaxdelta.commands.compare import main

if __name__ == "__main__":
    main()
