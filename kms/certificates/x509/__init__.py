"""X.509 by pyca/cryptography, which writes and reads all DER. The token signs."""

import warnings

# pyca warns of these in what others send, and the service refuses it. On standard error there are lines of the log only.
for _message in ("Attribute's length must be", "Parsed a serial number which wasn't positive"):
    warnings.filterwarnings("ignore", message=_message)
