import os
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    "Tests run side by side: torch takes one core each. Only where a test file has imported it."
    import sys
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(1)
