/* Where the values of a JSON object lie. What is between them is not judged: the kernels and clients of a benchmark write
   JSON, and fastwire, which judges every byte, is measured against who does not. */
#ifndef FLOOR_JSON_H
#define FLOOR_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

typedef struct {
    const char *p;
    size_t n;
} Span;

typedef struct {
    const char *name;
    Span value;
} Member;

static const char *json_space(const char *p, const char *end) {
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r')) p++;
    return p;
}

/* Behind the string that begins at p, or NULL. */
static const char *json_string(const char *p, const char *end) {
    for (p++; p < end; p++) {
        if (*p == '"') return p + 1;
        if (*p == '\\') p++;
    }
    return NULL;
}

/* Behind the value that begins at p, or NULL. */
static const char *json_value(const char *p, const char *end) {
    int depth = 0;
    while (p < end) {
        switch (*p) {
        case '"':
            if (!(p = json_string(p, end))) return NULL;
            if (!depth) return p;
            continue;
        case '{':
        case '[':
            depth++;
            break;
        case '}':
        case ']':
            if (!depth) return p; /* of a number that ends what it is in */
            if (!--depth) return p + 1;
            break;
        case ',':
            if (!depth) return p;
        }
        p++;
    }
    return NULL;
}

/* Fills in the values of those members that the object has. */
static bool json_members(Span text, Member *members, int count) {
    const char *end = text.p + text.n, *p = json_space(text.p, end);
    if (p == end || *p++ != '{') return false;
    for (;;) {
        p = json_space(p, end);
        if (p == end || *p != '"') return p < end && *p == '}';
        const char *name = p + 1, *behind = json_string(p, end);
        if (!behind || (p = json_space(behind, end)) == end || *p++ != ':') return false;
        const char *value = json_space(p, end);
        if (!(p = json_value(value, end))) return false;
        size_t length = (size_t)(behind - 1 - name);
        for (int i = 0; i < count; i++)
            if (strlen(members[i].name) == length && !memcmp(members[i].name, name, length))
                members[i].value = (Span){value, (size_t)(p - value)};
        p = json_space(p, end);
        if (p < end && *p == ',') p++;
    }
}

#endif
