"""`python -m backupfs`."""

from backupfs.cli.main import main

if __name__ == "__main__":
    main()
