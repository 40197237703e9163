package config

import "strings"

// Schema is the JSON schema of pentad.yaml (json-schema.org, draft 2020-12).
func Schema() map[string]any {
	root := object("pentad.yaml")
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	at := map[string]map[string]any{"": root}
	for _, k := range Keys() {
		parent, name := cutPath(k.Path)
		node := k.schema()
		into := at[parent]
		into["properties"].(map[string]any)[name] = node
		if k.Required {
			required, _ := into["required"].([]string)
			into["required"] = append(required, name)
		}
		at[k.Path], at[k.Path+"[]"] = node, node
	}
	for _, k := range Keys() {
		finishNode(at, k)
	}
	root["patternProperties"] = map[string]any{"^x-": true}
	return root
}

func object(title string) map[string]any {
	return map[string]any{"title": title, "type": "object", "properties": map[string]any{}, "additionalProperties": false}
}

// cutPath returns the path of the mapping that holds a key, and the key.
func cutPath(path string) (parent, name string) {
	i := strings.LastIndex(path, ".")
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

// schema is what a key may be. Mappings get their keys later.
func (k Key) schema() map[string]any {
	node := map[string]any{"description": k.Doc}
	if k.Default != "" {
		node["default"] = k.Default
	}
	switch {
	case k.Words != nil:
		node["enum"] = k.Words
	case k.Low != 0 || k.High != 0:
		node["type"], node["minimum"], node["maximum"] = "integer", k.Low, k.High
	case k.Kind == "true or false":
		node["type"] = "boolean"
	case k.Kind == "duration":
		node["type"], node["pattern"] = "string", `^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`
	case k.Kind == "percentage":
		node["type"], node["pattern"] = "string", `^[0-9]+%$`
	case strings.HasSuffix(k.Kind, ", or mapping"):
		node["properties"] = map[string]any{}
	case strings.Contains(k.Kind, ", or list of "):
		node["anyOf"] = []any{map[string]any{"type": "string"}, map[string]any{"type": "array", "items": map[string]any{"type": "string"}}}
	case k.Kind == "list of ports":
		node["type"], node["items"] = "array", map[string]any{"type": []string{"integer", "string"}}
	case strings.HasPrefix(k.Kind, "list of "):
		node["type"], node["items"] = "array", map[string]any{"type": "string"}
	case strings.HasPrefix(k.Kind, "mapping"):
		node["properties"] = map[string]any{}
	default:
		node["type"] = "string"
	}
	if k.Several {
		node["properties"] = map[string]any{}
	}
	return node
}

// finishNode gives a mapping, or the list of mappings, its type once its keys are known.
func finishNode(at map[string]map[string]any, k Key) {
	node := at[k.Path]
	properties, _ := node["properties"].(map[string]any)
	if properties == nil {
		return
	}
	item := map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
	if required := node["required"]; required != nil {
		item["required"] = required
	}
	// YAML merges what << names before the schema is looked at; editors do not.
	properties["<<"] = true
	delete(node, "properties")
	delete(node, "required")
	switch {
	case k.Kind == "list of services":
		delete(item, "required") // defaults and << may have what is missing
		node["items"] = item
	case k.Kind == "list of backends":
		node["items"] = map[string]any{"anyOf": []any{map[string]any{"type": "string"}, item}}
	case k.Several:
		node["items"] = item
	case strings.HasSuffix(k.Kind, ", or mapping"):
		node["anyOf"] = []any{map[string]any{"type": "array", "items": map[string]any{"type": "string"}}, item}
	case k.Kind == "mapping or off":
		node["anyOf"] = []any{item, map[string]any{"const": "off"}}
	default:
		for key, v := range item {
			node[key] = v
		}
	}
}
