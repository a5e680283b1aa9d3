"""`python -m secateur.cli`, where the script `secateur` is not on the path."""

from secateur.cli import main

if __name__ == "__main__":
    main()
