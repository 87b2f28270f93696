"""The command `jaxdelta-merge`, from a checkout."""

from jaxdelta.commands.merge import main

if __name__ == "__main__":
    main()
