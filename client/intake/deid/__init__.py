"""De-identification of DICOM by PS3.15 annex E: what is on no list of what may stay is removed."""
