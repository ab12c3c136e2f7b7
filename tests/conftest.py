import os
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest

if os.environ.get('FASTGRADSTATS_SEED'): import order                  # noqa: F401


@pytest.fixture(scope='session', autouse=True)
def threads():
    "Tests run side by side: torch takes one core each, unless told otherwise. Only where a test file has imported it."
    import sys
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))

def pytest_collection_modifyitems(items):
    "Notebooks first: at the end they would run alone."
    items.sort(key=lambda item: item.path.name != 'test_notebooks.py')
