"""Electrocardiograms: WFDB records to twelve leads in mV, and the tables of PTB-XL."""
