"""A hospital's side: patient data stays here, and only a release leaves."""
