"""`python -m jaxdelta`: the command `jaxdelta`."""

from jaxdelta.commands.analyze import main

if __name__ == "__main__":
    main()
