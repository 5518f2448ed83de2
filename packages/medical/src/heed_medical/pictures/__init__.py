"""Labelled pictures for classification: lists in their real layouts, reading, augmentation."""
