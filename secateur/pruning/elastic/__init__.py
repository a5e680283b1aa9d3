"""Elastic models (EPTS, arXiv 2606.25285): optimised once, materialised at any sparsity. docs/methods/epts.md says how."""
