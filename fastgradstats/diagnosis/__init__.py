"""What a record means: evidence, rules, findings, the report. Imports record; no torch, no fastai, never measure."""
