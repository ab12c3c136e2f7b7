"""How a tensor is reduced to numbers: compiled loops of the CPU. Imports what measure may."""
