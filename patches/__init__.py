"""One file, one method. Importing a file registers it; none imports torch at import time."""
