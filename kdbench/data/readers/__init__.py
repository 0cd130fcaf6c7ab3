"""One reader a family of datasets: a function from where the data is to a Source."""
