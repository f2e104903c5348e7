"""Diagnosis of classifiers: named, tested reasons for their errors on a labelled data set."""
