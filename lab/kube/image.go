package kube

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

// An image is written as an OCI image layout (github.com/opencontainers/image-spec,
// image-layout.md), as `ctr image import` reads it.

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// layout gathers the blobs of an image.
type layout struct {
	w   *tar.Writer
	err error
}

func (l *layout) file(name string, mode int64, data []byte) {
	if l.err == nil {
		l.err = l.w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), Typeflag: tar.TypeReg})
	}
	if l.err == nil {
		_, l.err = l.w.Write(data)
	}
}

func (l *layout) blob(mediaType string, data []byte) descriptor {
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	l.file("blobs/sha256/"+sum, 0o644, data)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: len(data)}
}

func (l *layout) json(mediaType string, v any) descriptor {
	data, err := json.Marshal(v)
	if l.err == nil {
		l.err = err
	}
	return l.blob(mediaType, data)
}

// WriteImage writes an image of one program, which is its entry point, into a file.
func WriteImage(path, name, program string) error {
	binary, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	var root bytes.Buffer
	files := &layout{w: tar.NewWriter(&root)}
	files.file("program", 0o755, binary)
	if err := files.w.Close(); err != nil || files.err != nil {
		return fmt.Errorf("image %s: %w", name, files.err)
	}
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	l := &layout{w: tar.NewWriter(out)}
	l.file("oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	layer := l.blob("application/vnd.oci.image.layer.v1.tar", root.Bytes())
	config := l.json("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/program"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}},
	})
	manifest := l.json("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []descriptor{layer},
	})
	manifest.Annotations = map[string]string{"io.containerd.image.name": name}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})
	if err != nil {
		return err
	}
	l.file("index.json", 0o644, index)
	if l.err == nil {
		l.err = l.w.Close()
	}
	if l.err != nil {
		return fmt.Errorf("image %s: %w", name, l.err)
	}
	return nil
}
