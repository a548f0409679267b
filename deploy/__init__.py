"The whole system on one machine or in containers: its services' start, health and configuration."
