"The command of the zoo, the folder beside this file: python benchmarks/zoo.py --help"
import sys

from zoo.command import main

if __name__ == '__main__': sys.exit(main())
