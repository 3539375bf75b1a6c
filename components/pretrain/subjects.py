"""What the world can show: subject names, the emoji that draw them, and what is held out."""

# Prompt name -> names of the emoji (Unicode short names) that may draw it, several poses a name.
SUBJECTS: dict[str, dict[str, list[str]]] = {
    "animal": {
        "monkey": ["monkey face", "monkey"], "gorilla": ["gorilla"],
        "dog": ["dog face", "dog", "guide dog"], "poodle": ["poodle"], "wolf": ["wolf"],
        "fox": ["fox"], "raccoon": ["raccoon"], "cat": ["cat face", "cat", "black cat"],
        "lion": ["lion"], "tiger": ["tiger face", "tiger"], "leopard": ["leopard"],
        "horse": ["horse face", "horse"], "unicorn": ["unicorn"], "zebra": ["zebra"],
        "deer": ["deer"], "cow": ["cow face", "cow"], "ox": ["ox"], "pig": ["pig face", "pig"],
        "boar": ["boar"], "sheep": ["ewe", "ram"], "goat": ["goat"],
        "camel": ["camel", "two-hump camel"], "llama": ["llama"], "giraffe": ["giraffe"],
        "elephant": ["elephant"], "rhino": ["rhinoceros"], "hippo": ["hippopotamus"],
        "mouse": ["mouse face", "mouse"], "hamster": ["hamster"],
        "rabbit": ["rabbit face", "rabbit"], "squirrel": ["chipmunk"], "hedgehog": ["hedgehog"],
        "bat": ["bat"], "bear": ["bear"], "polar bear": ["polar bear"], "koala": ["koala"],
        "panda": ["panda"], "sloth": ["sloth"], "otter": ["otter"], "skunk": ["skunk"],
        "kangaroo": ["kangaroo"], "turkey": ["turkey"], "chicken": ["chicken"],
        "rooster": ["rooster"], "chick": ["baby chick", "front-facing baby chick"],
        "bird": ["bird"], "penguin": ["penguin"], "eagle": ["eagle"], "duck": ["duck"],
        "swan": ["swan"], "owl": ["owl"], "flamingo": ["flamingo"], "peacock": ["peacock"],
        "parrot": ["parrot"], "frog": ["frog"], "crocodile": ["crocodile"], "turtle": ["turtle"],
        "lizard": ["lizard"], "snake": ["snake"], "dragon": ["dragon face", "dragon"],
        "dinosaur": ["sauropod", "T-Rex"], "whale": ["spouting whale", "whale"],
        "dolphin": ["dolphin"], "seal": ["seal"], "fish": ["fish", "tropical fish"],
        "shark": ["shark"], "octopus": ["octopus"], "crab": ["crab"], "lobster": ["lobster"],
        "snail": ["snail"], "butterfly": ["butterfly"], "bee": ["honeybee"],
        "ladybug": ["lady beetle"], "spider": ["spider"],
    },
    "vehicle": {
        "car": ["automobile", "oncoming automobile"], "taxi": ["taxi", "oncoming taxi"],
        "police car": ["police car", "oncoming police car"], "bus": ["bus", "oncoming bus"],
        "ambulance": ["ambulance"], "fire truck": ["fire engine"],
        "truck": ["delivery truck", "articulated lorry"], "pickup truck": ["pickup truck"],
        "tractor": ["tractor"], "race car": ["racing car"], "motorcycle": ["motorcycle"],
        "scooter": ["motor scooter"], "bicycle": ["bicycle"], "skateboard": ["skateboard"],
        "train": ["locomotive", "train"], "airplane": ["airplane", "small airplane"],
        "helicopter": ["helicopter"], "rocket": ["rocket"], "sailboat": ["sailboat"],
        "ship": ["ship"], "boat": ["motor boat", "speedboat"], "canoe": ["canoe"],
        "flying saucer": ["flying saucer"],
    },
    "food": {
        "apple": ["red apple", "green apple"], "banana": ["banana"], "orange": ["tangerine"],
        "lemon": ["lemon"], "watermelon": ["watermelon"], "grapes": ["grapes"],
        "strawberry": ["strawberry"], "pineapple": ["pineapple"], "pear": ["pear"],
        "peach": ["peach"], "cherries": ["cherries"], "tomato": ["tomato"],
        "avocado": ["avocado"], "eggplant": ["eggplant"], "carrot": ["carrot"],
        "broccoli": ["broccoli"], "mushroom": ["mushroom"], "bread": ["bread"],
        "pretzel": ["pretzel"], "cheese": ["cheese wedge"], "hamburger": ["hamburger"],
        "pizza": ["pizza"], "hot dog": ["hot dog"], "taco": ["taco"], "egg": ["egg"],
        "donut": ["doughnut"], "cookie": ["cookie"], "cake": ["birthday cake", "shortcake"],
        "cupcake": ["cupcake"], "ice cream": ["soft ice cream", "ice cream"],
        "lollipop": ["lollipop"], "cup": ["hot beverage", "teacup without handle"],
        "teapot": ["teapot"], "popcorn": ["popcorn"],
    },
    "object": {
        "teddy bear": ["teddy bear"], "backpack": ["backpack"], "handbag": ["handbag"],
        "shoe": ["running shoe", "man’s shoe"], "boot": ["woman’s boot", "hiking boot"],
        "hat": ["woman’s hat"], "crown": ["crown"], "glasses": ["glasses"],
        "shirt": ["t-shirt"], "dress": ["dress"], "sock": ["socks"], "guitar": ["guitar"],
        "violin": ["violin"], "drum": ["drum"], "trumpet": ["trumpet"],
        "phone": ["mobile phone"], "laptop": ["laptop"], "camera": ["camera"],
        "television": ["television"], "radio": ["radio"],
        "clock": ["alarm clock", "mantelpiece clock"], "watch": ["watch"],
        "book": ["closed book", "green book", "blue book", "orange book"],
        "lamp": ["light bulb"], "candle": ["candle"], "key": ["key"], "hammer": ["hammer"],
        "scissors": ["scissors"], "umbrella": ["umbrella"], "chair": ["chair"],
        "bucket": ["bucket"], "basket": ["basket"], "bell": ["bell"], "trophy": ["trophy"],
        "soccer ball": ["soccer ball"], "basketball": ["basketball"], "balloon": ["balloon"],
        "gift": ["wrapped gift"], "robot": ["robot"], "alien": ["alien monster"],
        "ghost": ["ghost"], "pumpkin": ["jack-o-lantern"], "snowman": ["snowman without snow"],
        "house": ["house", "house with garden"], "castle": ["castle"], "tent": ["tent"],
        "tree": ["deciduous tree"], "palm tree": ["palm tree"], "cactus": ["cactus"],
        "rose": ["rose"], "sunflower": ["sunflower"], "tulip": ["tulip"], "star": ["star"],
        "heart": ["red heart"], "vase": ["amphora"], "jar": ["jar"], "magnet": ["magnet"],
        "gem": ["gem stone"], "toolbox": ["toolbox"], "yarn": ["yarn"],
        "suitcase": ["luggage"], "mailbox": ["postbox"], "toy": ["teddy bear", "robot", "rocket"],
        "can": ["canned food"], "bowl": ["bowl with spoon", "green salad"],
        "sneaker": ["running shoe"], "stuffed animal": ["teddy bear"],
    },
}
# Names that take no article.
PLURAL = {
    "grapes", "cherries", "glasses", "scissors", "popcorn", "broccoli", "bread", "cheese", "yarn",
}
# Things a subject can wear: phrase -> emoji.
WORN = {
    "a top hat": "top hat", "a crown": "crown", "a graduation cap": "graduation cap",
    "a cap": "billed cap",
}
WEARERS = {"robot", "ghost", "teddy bear", "snowman", "alien", "toy"}  # beside every animal
STYLES = ("3d", "noto", "twemoji", "flat")
# Subjects the pair never sees: (style, emoji). Their classes stay in training in other styles.
HELD_OUT = {
    ("3d", "cat face"), ("3d", "teddy bear"), ("3d", "duck"), ("3d", "backpack"), ("3d", "teapot"),
    ("3d", "running shoe"), ("3d", "fox"), ("3d", "rocket"), ("3d", "owl"), ("3d", "alarm clock"),
    ("3d", "automobile"), ("3d", "robot"), ("noto", "dog face"), ("noto", "guitar"),
    ("noto", "T-Rex"), ("noto", "cupcake"), ("twemoji", "penguin"),
}
# The sample concepts that ship with the project: id -> (style, emoji, class noun, live subject).
SAMPLE_CONCEPTS = {
    "fox": ("3d", "fox", "fox", True),
    "cat": ("3d", "cat face", "cat", True),
    "duck": ("3d", "duck", "duck", True),
    "owl": ("3d", "owl", "owl", True),
    "dog": ("noto", "dog face", "dog", True),
    "teddy_bear": ("3d", "teddy bear", "teddy bear", False),
    "robot": ("3d", "robot", "robot", False),
    "backpack": ("3d", "backpack", "backpack", False),
    "teapot": ("3d", "teapot", "teapot", False),
    "sneaker": ("3d", "running shoe", "shoe", False),
    "rocket": ("3d", "rocket", "rocket", False),
    "alarm_clock": ("3d", "alarm clock", "clock", False),
}
