"""`python -m train fit|validate|test --config configs/NAME.yaml`."""

from train.cli import main

if __name__ == "__main__":
    main()
