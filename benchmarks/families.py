"The command of the families, the folder zoo/families: python benchmarks/families.py --help"
import sys

from zoo.families.command import main

if __name__ == '__main__': sys.exit(main())
