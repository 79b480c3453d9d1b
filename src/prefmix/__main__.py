"""`python -m prefmix`, the face that launchers of many processes use."""

from prefmix.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
