"""Built-in prompts, asked beside those of a request where those alone have too few positions to compare.

Each is a sequence of sentences: a model with a short context gets as many as fit.
"""

PASSAGES = (
    (
        "Please summarize the following report in two sentences.",
        "The research vessel left the harbour of Bergen on a Tuesday morning with eleven scientists on board.",
        "They lowered a chain of 24 thermometers to a depth of 900 metres and read them every hour for nine days.",
        "Near the surface the water was two degrees warmer than in 1986, while below 600 metres nothing had changed.",
        "The captain decided to return early, because a storm was moving in from the west and fuel had become scarce.",
        "A second voyage, with better instruments and a larger crew, is planned for the autumn of next year.",
    ),
    (
        "Explain what this program does, and whether it has a mistake.",
        "def largest(values):\n    best = 0\n    for each in values:\n        best = max(best, each)\n    return best",
        "print(largest([3, 9, 2]), largest([-5, -1]), largest([]))\n",
        "A web service calls it that sorts the orders of a shop by price, and stops at the same hour each night.",
        "Which test would you write first, and how should the function answer when the list is empty?",
    ),
    (
        "A customer writes to us, and I would like to answer politely.",
        "Hello, I ordered a blue jacket in size M three weeks ago, order number 48213, and it has still not arrived.",
        "The tracking page says that the parcel was handed to a neighbour, but none of my neighbours knows about it.",
        "I have already called your hotline twice and waited for more than half an hour each time.",
        "Either send me another jacket by Friday or give me my 79.90 euros back, otherwise I will cancel my account.",
    ),
    (
        "Solve this step by step and give the result as a number.",
        "A train leaves the first station at 8:15 and travels 180 kilometres at a speed of 90 kilometres per hour.",
        "It waits there for 20 minutes, then goes on for another 120 kilometres at a speed of 80 kilometres per hour.",
        "A second train leaves the same station one hour later and needs only three quarters of the time in all.",
        "At what time does each of them arrive, and how many minutes lie between the two arrivals?",
    ),
    (
        "Translate the following text into English and correct its mistakes.",
        "Gestern sind wir mit dem Fahrrad an den See gefahren, obwohl es am Morgen noch geregnet hatte.",
        "Le soir, nous avons mangé du poisson grillé dans un petit restaurant près du port.",
        "Mañana por la mañana queremos visitar el museo antes de que vuelva a hacer demasiado calor.",
    ),
    (
        "Write a short story that begins like this.",
        "Nobody in the village remembered who had built the clock, nor why its hands went backwards.",
        "Every evening at seven the old watchmaker climbed the tower with a lantern and a can of oil.",
        "On the day his granddaughter came to visit, the bells rang thirteen times, and the river stood still.",
    ),
    (
        "Answer the following questions, each in one sentence.",
        "Why is the sky blue during the day and red in the evening?",
        "Which vitamins are found in oranges, carrots and spinach, and what does the body need them for?",
        "What is the difference between a virus and a bacterium, and why do antibiotics help against only one of them?",
        "Who may vote in the elections for the European Parliament, and how often do they take place?",
    ),
)
