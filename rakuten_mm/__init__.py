__version__ = "0.2.0"

import warnings

warnings.filterwarnings('ignore', message='IProgress not found')  # bars are text where ipywidgets is not installed
