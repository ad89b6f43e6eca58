"""Small models, data and a classifier to try methods on. Any other LightningModule and data module will do as well."""
