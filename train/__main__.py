"""`python -m train fit|validate|test|encode --config configs/NAME.yaml`."""

import sys


def run() -> int:
    """Run the command that the arguments name."""
    if sys.argv[1:2] == ["encode"]:  # the only one that is not Lightning's
        from train.encode import main as encode

        return encode(sys.argv[2:])
    from train.cli import main

    main()
    return 0


if __name__ == "__main__":
    sys.exit(run())
