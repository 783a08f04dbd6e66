"""Words and filler sentences of the testbed's tasks.

The filler is pseudo-English: sentences drawn from templates over word lists, so that prompts of any length can be made
without shipping a corpus.  It depends on the ``random.Random`` passed in and on nothing else.
"""

from __future__ import annotations

import random

# Words of the keys: a key is "<adjective> <noun>", 200 x 200 pairs.
ADJECTIVES = tuple(
    """able angry basic bitter black blank bold brave brief bright broad broken brown busy calm careful certain cheap
    chief civil clean clear clever close cold common cool crisp cruel curious daily damp dark dead dear deep distant
    divine double dry dull eager early eastern easy empty entire equal evil exact faint fair faithful false familiar
    famous fatal fierce final fine firm first flat foreign formal former frank free fresh front full funny gentle giant
    glad golden good grand grave gray great green grim happy hard heavy hidden high hollow holy honest huge human humble
    idle infinite inner iron keen kind large last late lazy level light little local lonely long loose loud lovely low
    loyal lucky mad main mean merry mild minor modern moral narrow native near neat new noble noisy old open orange
    outer pale patient perfect plain pleasant polite poor present pretty private proper proud public pure quick quiet
    rapid rare raw ready real recent red rich right rough round royal rude sacred safe savage secret separate serious
    severe shallow sharp short silent silver simple single slow small smooth social soft solemn solid sour southern
    special square steady steep stern stiff still strange strong sudden sweet swift tall tender thick thin tiny tired
    tough true vast violent warm weak wet white wicked wide wild wise wooden worthy yellow young""".split()
)
NOUNS = tuple(
    """action animal answer apple army arrow baby bank basket battle beach bear beast bed bell bench bird blade blood
    board boat body bone book border bottle bottom bow box boy branch bread breakfast bridge brother butter cabin candle
    captain castle chain chair chamber child church circle city cloth cloud coach coast coat coffee colour column corner
    cottage country court cousin cow cross crowd crown daughter desert desk devil dinner doctor dog door dream dress
    duke dust eagle ear earth edge egg empire engine entry evening eye face father feather field fire fish flag flame
    flower forest friend fruit garden gate ghost gift girl glass glove gold grass guard guest gun hall hammer hand
    harbour hat head heart hill history horse hotel hour house hunter husband island jewel journey judge king kitchen
    knee knife
    lady lake lamp land leaf leather letter library lion lord machine maid map market master meadow mile milk mirror
    moment money monster month moon morning mother mountain mouth music nail needle neighbour night nose ocean office
    officer orchard owner page palace paper parent park path pearl picture pillow pipe pocket poet priest prince prison
    queen rain ring river road robe rock roof room root rope rose sailor salt school sea servant shadow sheep ship shoe
    shore sister sky snow soldier son song soul spirit spring star station stone storm story stranger street student
    summer sun sword table teacher temple throne tiger tower town train tree valley village voice wagon wall water
    wheel wind window wine winter witness wolf woman world""".split()
)
_PEOPLE = (
    """the baker|the old ferryman|our clerk|a miller|the gardener's niece|Mr. Harlow|Mrs. Penn|the surveyor
a tailor|the watchman|Anna|Thomas|a young painter|the postman|her uncle|his aunt|the mayor|Dr. Finch
the cooper|a traveller|the harbour master|the weaver|two brothers|the apprentice|an archivist
the schoolmistress|a shepherd|the choir|the innkeeper|the printer
""".strip()
    .replace("\n", "|")
    .split("|")
)
_VERBS = (
    """carried|mended|painted|counted|forgot|borrowed|admired|polished|described|measured|sold|found|hid|lost
sketched|weighed|returned|examined|moved|watched|wrapped|covered|repaired|named|ordered|copied|guarded
cleaned|collected|dropped
""".strip()
    .replace("\n", "|")
    .split("|")
)
_THINGS = (
    """a crate of pears|the copper kettle|three ledgers|a torn sail|the church clock|some woollen blankets
a bundle of reeds|the narrow ladder|a jar of honey|the last lantern|an oak barrel|the brass scales
a pair of boots|the ferry tickets|a cart of turf|the spare oars|a letter from the coast|the violin
a basket of eggs|the garden fence|several maps|a sack of barley|the chimney|the registry|an umbrella
the wet ropes|a plate of bread|the painted sign|a stack of slates|the mill wheel|a loaf of rye
the telescope|a broken plough|the blue curtains
""".strip()
    .replace("\n", "|")
    .split("|")
)
_PLACES = (
    """near the quay|behind the mill|in the lower meadow|by the west gate|at the end of the lane
under the bridge|beside the chapel|on the long pier|across the square|in the attic|above the bakery
outside the inn|along the canal|at the edge of the wood|in the cellar|upon the hill
between the two barns|inside the station|close to the well|past the toll house|beneath the stairs
in front of the school
""".strip()
    .replace("\n", "|")
    .split("|")
)
_TIMES = (
    """before noon|late in the evening|on market day|during the thaw|after the second bell|every spring
one windy night|at low tide|in the first week of May|while it rained|shortly before supper
on the way home|that same winter|without a word|as the fog lifted|when nobody was looking
for the third time|in great haste
""".strip()
    .replace("\n", "|")
    .split("|")
)
_CLAUSES = (
    """nobody seemed to mind|the weather did not improve|it was a poor year for apples|the road stayed closed
the dogs slept through it all|there was little else to do|the bells had already stopped
it took longer than expected|the price had gone up again|no one asked for the reason
the river was still rising|the lamps were not yet lit|the neighbours spoke of it for weeks
such things were common there|the paint never quite dried|the children thought it very funny
the smoke hung low over the roofs|it hardly mattered by then
""".strip()
    .replace("\n", "|")
    .split("|")
)
_TEMPLATES = (
    "{p} {v} {t} {l}.",
    "{m}, {p} {v} {t}.",
    "{p} {v} {t} {m}, and {c}.",
    "{p} {v} {t}, but {q} {w} {u} {l}.",
    "It was {p} who {v} {t} {m}.",
    "{l}, {p} {v} {t} and {q} {w} {u}.",
    "Although {c}, {p} {v} {t} {l}.",
    "{c}, so {p} {v} {t} {m}.",
    "Nobody knew why {p} {v} {t} {l} {m}.",
    "When {p} {v} {t}, {c}.",
    "{p} and {q} {v} {t} {l}; {c}.",
)


def sentence(rng: random.Random) -> str:
    """One filler sentence, capitalised, ending in a full stop."""
    pick = rng.choice
    text = pick(_TEMPLATES).format(
        p=pick(_PEOPLE), q=pick(_PEOPLE), v=pick(_VERBS), w=pick(_VERBS), t=pick(_THINGS), u=pick(_THINGS),
        l=pick(_PLACES), m=pick(_TIMES), c=pick(_CLAUSES),
    )  # fmt: skip
    return text[0].upper() + text[1:]


def filler(characters: int, rng: random.Random) -> str:
    """At least ``characters`` characters of filler, in paragraphs of 3 to 8 sentences, starting with a space."""
    parts: list[str] = []
    size, left = 0, rng.randint(3, 8)
    while size < characters:
        text = sentence(rng)
        parts.append((" " if left else "\n\n") + text)
        size += len(text) + 1
        left = left - 1 if left else rng.randint(2, 7)
    return "".join(parts)
