"A challenger to the champion."
