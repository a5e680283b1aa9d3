"""The pruning engine. Headers, families, datasets, registry and admission import neither torch nor numpy."""
