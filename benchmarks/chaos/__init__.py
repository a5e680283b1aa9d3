"""A whole service, on PostgreSQL, Valkey and S3, that is beaten while it works: `make chaos`."""
