"""Guess the language of a text from its script and its commonest words.

A heuristic for IFEval, instead of a trained classifier: the script with most letters narrows the
languages down, then the one whose common words occur most often is taken. Texts of a few words, and
mixtures, may give several languages or none.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

__all__ = ["LANGUAGES", "likely_languages"]

# By the first word of a letter's Unicode name. Japanese is told from Chinese by its kana.
_ONE_LANGUAGE = {
    "KANNADA": "kn", "GURMUKHI": "pa", "TELUGU": "te", "TAMIL": "ta", "GUJARATI": "gu",
    "MALAYALAM": "ml", "BENGALI": "bn", "THAI": "th", "HANGUL": "ko", "HEBREW": "he",
    "GREEK": "el", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh",
}  # fmt: skip
_COMMON_WORDS = {
    "LATIN": {
        "en": "the of and to in is that it for you was with on are this be have not as at by from",
        "de": "der die das und ist nicht ein eine zu mit den von für auf sich dem es ich wir sie",
        "fr": "le la les de des et est un une que qui dans pour pas vous nous ce il sur avec du",
        "es": "el la los las de y es un una que en para no por con se su lo como más del",
        "pt": "o a os as de e é um uma que em para não por com se do da no na você mais",
        "it": "il lo la gli di e è un una che in per non con si del della sono come più",
        "pl": "i w na z nie się to jest że do jak ale przez dla o co są być po lub",
        "vi": "và là của có cho không được một những người trong với các để này khi đã bạn",
        "sw": "na ya wa kwa ni za katika la kuwa hii cha kama ili yake au watu sana lakini",
        "fi": "ja on ei se että hän oli ovat kun mutta myös joka voi tai kuin niin olla sen",
        "nl": "de het een en van is niet dat op te zijn voor met die aan er ook als maar",
        "sv": "och är det att en som på av för med inte den till har ett om kan jag men",
        "tr": "ve bir bu için ile çok da de daha olan gibi ne ama olarak en var sonra kadar",
        "id": "dan yang di untuk dengan dari ini itu tidak adalah pada ke dalam akan atau kami",
    },
    "CYRILLIC": {
        "ru": "и в не на что с это как по но он мы для из ы был все если или ещё только чтобы",
        "uk": "і в не на що з це як та але він ми для є або її який щоб також від є було ти",
        "bg": "и в не на че с това как по но той ние за са от се да е или ще който като има",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا التي هو مع ما هذه كان عن لا الذي ذلك أو كل هي ثم قد",
        "fa": "و در به از که این است را با برای آن یک می شود ها تا بر هم خود شما اما",
        "ur": "کے کی میں ہے اور سے کا کو ہیں یہ کہ پر نے ایک وہ بھی کر لیے آپ تھا نہیں",
    },
    "DEVANAGARI": {
        "hi": "के है में की और से का को हैं यह कि पर ने एक वह भी कर लिए आप था नहीं",
        "mr": "आणि आहे या च्या ते की हे एक मी आहेत तर होते नाही साठी आपण किंवा करून हा ही",
        "ne": "र छ को मा हो यो छन् लागि पनि एक तपाईं गर्न भएको लाई ले गर्नुहोस् हुन्छ छैन",
    },
}
_WORDS = {
    script: {language: frozenset(words.split()) for language, words in languages.items()}
    for script, languages in _COMMON_WORDS.items()
}
LANGUAGES = frozenset(_ONE_LANGUAGE.values()).union(*_WORDS.values())


_PUNCTUATION = {ord(sign): " " for sign in ".,;:!?()[]{}\"'«»“”‘’।،؛؟—–*#-_/"}


def likely_languages(text: str) -> frozenset[str]:
    """The likeliest languages of a text, as two letters; none if it has no letters.

    All languages of a script are equally likely if no common word of any of them occurs. A script
    that is not listed here gives "?".
    """
    text = unicodedata.normalize("NFC", text)
    counts = Counter(
        unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()
    )
    if not counts:
        return frozenset()
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * sum(counts.values()):
        return frozenset({"ja"})  # among more characters that it shares with Chinese
    script = counts.most_common(1)[0][0]
    if script not in _WORDS:
        return frozenset({_ONE_LANGUAGE.get(script, "?")})
    # Not split at \W, which matches the vowel signs of Indic scripts.
    words = Counter(text.casefold().translate(_PUNCTUATION).split())
    hits = {
        language: sum(words[word] for word in common) for language, common in _WORDS[script].items()
    }
    return frozenset(language for language in hits if hits[language] == max(hits.values()))
