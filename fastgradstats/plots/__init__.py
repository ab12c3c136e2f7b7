"""Pictures of records. Imports record and diagnosis; no torch, no fastai."""
