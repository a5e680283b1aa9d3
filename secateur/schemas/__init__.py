"""What the HTTP API answers, one file a resource: the service builds these, the client reads them.

A reader must put up with fields that it does not know (`model_validate(…, extra="ignore")`): fields may be added.
"""
