"""The command `jaxdelta-plot`, from a checkout."""

from jaxdelta.commands.plot import main

if __name__ == "__main__":
    main()
