"""Train a sparse network: python train.py [group=option] [key=value] ... (see README.md; --help lists the groups)."""

from pl_sparse.app import main

if __name__ == "__main__":
    main()
