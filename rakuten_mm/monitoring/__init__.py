"Is what is served still what it was made for?"
