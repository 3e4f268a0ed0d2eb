"""DICOM and pictures in, a de-identified cohort out."""
