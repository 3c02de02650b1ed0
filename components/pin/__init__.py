"""Pin: store the release and its texts under digests, and find the present champion."""
