"""Find and describe models: references, search, lineage, model cards."""
