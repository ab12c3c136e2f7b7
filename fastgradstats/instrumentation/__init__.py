"Every training run of a process, recorded without a word in its code: `instrument()`. Imports measure and callbacks."
