"""diffusers pipelines per modality, and media writers."""
