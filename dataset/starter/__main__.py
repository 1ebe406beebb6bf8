"""python -m dataset.starter: write the starter corpus."""

from dataset.starter.corpus import main

if __name__ == "__main__":
    main()
