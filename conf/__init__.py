"""The configuration groups, for `hydra.searchpath: [pkg://pl_sparse.conf]` (docs/hydra.md)."""
