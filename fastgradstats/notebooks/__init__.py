"""A notebook or script that exists, run as it is, with what its networks did written under the cells that trained them.
Imports record, diagnosis, plots and comparison; what runs in the kernel imports nothing heavy before the notebook does.

`execute`: a copy is run, cell by cell (the host's side); `in_kernel`: what the added first cell starts (the kernel's).
`source`: what is run; `section`, `index`, `changes`: what is added; `shims`, `data_dir`, `shorten`: old notebooks, data
that lie elsewhere, less training, all of them on `_on_import`.
"""
