"A partner's storage to a raw folder that is complete."
