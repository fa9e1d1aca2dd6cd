"""Ten prompts whose answers are in their text, and ten whose answers are not; written for this benchmark."""

FERRY = (
    "The ferry between Halsnes and the island of Tarvoy was taken out of service on Monday morning after the crew "
    "found water in the engine room. The county says that a smaller boat will carry passengers until the ferry has "
    "been repaired, but that cars must wait. The repair is expected to take at least nine days. Tarvoy has 412 "
    "inhabitants, a school with 38 pupils and a fish factory that sends out two lorries every day. The manager of the "
    "factory says that they can store fish for three days, and that after this the factory will have to stop. The "
    "mayor has asked the county to hire a car ferry from the neighbouring county, and expects an answer on Wednesday."
)
LIBRARY = (
    "The town library opens a new reading room on the first of March. It has 64 seats, of which 20 are in a silent "
    "part behind glass. Visitors may borrow a laptop for up to four hours, and a locker for a whole day. The room is "
    "open from eight in the morning until ten in the evening, also on Saturdays; on Sundays it is open from noon "
    "until six. Children under twelve years must be accompanied by an adult after seven in the evening. Food is not "
    "allowed, but coffee in a cup with a lid is. The room cost 3.2 million kroner, half of which was a gift from a "
    "local bank."
)
GARDEN = (
    "Tomatoes needs a lot of light and they should not stand to close together. Water them in the morning, not in the "
    "evening, and try to keep the leafs dry. When the plant have got five flower clusters, you can cut of the top, so "
    "that it use its strength on the fruits. Remove the small shoots that grows between the stem and the branches. If "
    "the lower leafs turns yellow, the plant may lack magnesium, and you can give it a little epsom salt in the "
    "water. Its important to harvest the tomatoes as soon as they is ripe, because then the plant make new ones."
)
SVALBARD = (
    "Forskningsstasjonen ligger ved en fjord på vestkysten og har vært i drift siden 1968. Om sommeren arbeider det "
    "opptil 120 personer der, om vinteren bare 30. Stasjonen får strøm fra et dieselaggregat, men i fjor ble det satt "
    "opp solceller som dekker en femdel av behovet fra april til september. Forskerne måler blant annet "
    "luftforurensning, havis og dyreliv. Hvert år kommer det omkring 40 fly og 15 skip med folk og utstyr. Alle som "
    "skal ut av bebyggelsen, må ha med seg våpen på grunn av isbjørn, og de må si fra hvor de går og når de kommer "
    "tilbake."
)
SCHOOL = (
    "Kommunestyret vedtok i går å slå sammen de to skolene i bygda. Den nye skolen skal stå ferdig i august om tre år "
    "og få plass til 340 elever. Den skal bygges i tre og varmes opp med bergvarme. Prisen er anslått til 215 "
    "millioner kroner. Flere foreldre protesterte fordi noen av barna får over en time i buss hver dag. Ordføreren sa "
    "at ingen elever på de fire laveste trinnene skal reise mer enn 40 minutter, og at kommunen vil kjøpe to nye "
    "busser. Vedtaket ble gjort med 17 mot 10 stemmer."
)

GROUNDED = (
    f"Summarise this text in three sentences, in its own words.\n\n{FERRY}",
    f"Answer from the text, and quote the sentence that says so: how long will the repair take?\n\n{FERRY}",
    f"List the opening hours and all numbers in this text, each with the sentence that it stands in.\n\n{LIBRARY}",
    f"What are visitors allowed to do, and what not? Answer with sentences from the text.\n\n{LIBRARY}",
    f"Correct the spelling and grammar of this text. Write the whole text again.\n\n{GARDEN}",
    f"Rewrite this text as a numbered list, one sentence a line, and change nothing else.\n\n{GARDEN}",
    f"Gjenta de to første setningene i denne teksten, og oppsummer resten.\n\n{SVALBARD}",
    f"Svar ut fra teksten: Hva måler forskerne, og hva må de som går ut, ha med seg?\n\n{SVALBARD}",
    f"Skriv av alle setninger i denne teksten som har et tall i seg.\n\n{SCHOOL}",
    f"Skriv teksten om igjen, men bytt ut «bygda» med «byen».\n\n{SCHOOL}",
)

FREE = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain how a rainbow comes about, to a child of ten.",
    "Give me some advice for a first job interview.",
    "What is the difference between a virus and a bacterium?",
    "Write a poem about the first snow of the year.",
    "Describe a perfect day in the mountains.",
    "Why do we dream?",
    "Fortell meg om Norge.",
    "Skriv en liten historie om en katt som ikke liker vann.",
    "Hva bør jeg tenke på når jeg skal kjøpe sykkel?",
)
