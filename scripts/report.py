"""The command `jaxdelta-report`, from a checkout."""

from jaxdelta.commands.report import main

if __name__ == "__main__":
    main()
